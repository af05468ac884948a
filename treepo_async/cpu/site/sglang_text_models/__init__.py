"""The model classes that SGLang registers first when it starts without CUDA.

SGLang otherwise imports all of its some 250 model files before it loads one; for an architecture
that is not in here it still does.
"""
