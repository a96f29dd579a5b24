"""Loads a shared library with the interface of peer_library.h and makes a peer of it for h200_peers.py."""

import ctypes as C

import torch

ABI = 1
DV = 512


class Shape(C.Structure):
    """PeerShape of peer_library.h."""

    _fields_ = [(n, C.c_int32) for n in ("b", "s_q", "h_q", "num_pages", "max_pages", "num_sms", "causal")] + [
        ("scale", C.c_float)
    ]


def declare(lib):
    pointer, shape = C.c_void_p, C.POINTER(Shape)
    lib.peer_abi.restype, lib.peer_abi.argtypes = C.c_int, []
    lib.peer_name.restype, lib.peer_name.argtypes = C.c_char_p, []
    lib.peer_lse_rows.restype, lib.peer_lse_rows.argtypes = C.c_int, []
    lib.peer_workspace_bytes.restype, lib.peer_workspace_bytes.argtypes = C.c_int64, [shape]
    lib.peer_plan.restype, lib.peer_plan.argtypes = C.c_int, [shape, pointer, pointer, pointer]
    lib.peer_decode.restype = C.c_int
    lib.peer_decode.argtypes = [shape, *[pointer] * 4, C.c_int64, *[pointer] * 4]


def device_facts(tensor):
    """Multiprocessors and the current stream of the tensor's device; (1, None) on a CPU, where tests run."""
    if not tensor.is_cuda:
        return 1, None
    sms = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return sms, torch.cuda.current_stream(tensor.device).cuda_stream


def library(path):
    """The library's own name, and its maker of calls: for a row, a call that returns (out, lse)."""
    try:
        lib = C.CDLL(path)
        declare(lib)
    except (OSError, AttributeError) as reason:
        raise SystemExit(f"{path} is not a peer library: {reason}") from None
    if lib.peer_abi() != ABI:
        raise SystemExit(f"{path} has interface {lib.peer_abi()}, not {ABI}")

    def make(row):
        sms, stream = device_facts(row.q)
        shape = Shape(row.b, row.s_q, row.h_q, row.k.shape[0], row.table.shape[1], sms, int(row.causal), row.scale)
        size = lib.peer_workspace_bytes(shape)
        if size < 0:
            raise RuntimeError("the library does not serve this shape")
        device = row.q.device
        # 0xff bytes are NaN in f32 and -1 in int32: what the library forgets to write cannot look right.
        workspace = torch.full((max(size, 1),), 255, dtype=torch.uint8, device=device)
        out = torch.full((row.b, row.s_q, row.h_q, DV), float("nan"), dtype=torch.bfloat16, device=device)
        by_rows = lib.peer_lse_rows()
        lse = torch.full((row.b, *((row.s_q, row.h_q) if by_rows else (row.h_q, row.s_q))), float("nan"), device=device)
        answer = (out, lse.transpose(1, 2) if by_rows else lse)
        arguments = (
            shape, workspace.data_ptr(), row.q.data_ptr(), row.k.data_ptr(), row.table.data_ptr(), row.table.stride(0),
            row.lens.data_ptr(), out.data_ptr(), lse.data_ptr(), stream,
        )

        def checked(name, code):
            if code:
                raise RuntimeError(f"{name} returned error {code}")

        def call(_keep=workspace):
            checked("peer_decode", lib.peer_decode(*arguments))
            return answer

        checked("peer_plan", lib.peer_plan(shape, workspace.data_ptr(), row.lens.data_ptr(), stream))
        return call

    return lib.peer_name().decode(), make
