"""The inference engine: a host that supervises SGLang and its weights, and the client that actors use."""
