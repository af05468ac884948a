"""Stand-in for SGLang's compiled kernel package, for processors that it has no build for.

SGLang imports names from `sgl_kernel` unconditionally and then, finding no compiled operators,
takes its plain torch paths. Every name can therefore be imported; the one function that those
paths do call is written out here, and calling any other is an error that names it.
"""

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write each request's new cache slots into its row of the request-to-token table.

    Args:
        req_pool_indices: row of each request, `[R]`.
        req_to_token: the table, `[rows, pool_len]`, written in place.
        start_offset: first column to write, `[R]`.
        end_offset: column after the last, `[R]`.
        out_cache_loc: the slots of all requests in order, `[sum(end - start)]`.
        pool_len: width of the table; implied by its shape.
    """
    taken = 0
    spans = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, (start, end) in zip(req_pool_indices.tolist(), spans, strict=True):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing_kernel(*args, **kwargs):
        raise RuntimeError(f"sgl_kernel.{name} is compiled code, and this processor has no build")

    return missing_kernel
