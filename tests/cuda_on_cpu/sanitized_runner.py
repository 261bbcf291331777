"""Executes the calls that harness.run_sanitized sends, with each buffer its own allocation.

Standard library only: this interpreter runs with the sanitizers' runtime loaded first.
"""

import base64
import ctypes
import json
import sys

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def main() -> None:
    answers = []
    for call in json.load(sys.stdin):
        print(f"call {call['name']}", file=sys.stderr, flush=True)
        function = getattr(ctypes.CDLL(call["library"]), call["function"])
        function.restype = ctypes.c_char_p
        arguments, buffers = [], []
        for argument in call["arguments"]:
            kind = argument["kind"]
            buffer = None
            if kind == "null":
                arguments.append(ctypes.c_void_p(None))
            elif kind == "double":
                arguments.append(ctypes.c_double(float.fromhex(argument["value"])))
            elif kind == "int64":
                arguments.append(ctypes.c_int64(argument["value"]))
            elif kind == "int64s":
                data = b"".join(v.to_bytes(8, "little", signed=True) for v in argument["value"])
                buffer = (allocate(data), len(data))
                arguments.append(ctypes.c_void_p(buffer[0]))
            else:
                data = base64.b64decode(argument["data"])
                buffer = (allocate(data), len(data))
                arguments.append(ctypes.c_void_p(buffer[0] + argument["offset"]))
            buffers.append(buffer)
        error = function(*arguments)
        if error is not None:
            sys.exit(f"{call['name']}: {error.decode()}")
        answer = []
        for buffer in buffers:
            if buffer is None:
                answer.append(None)
                continue
            address, size = buffer
            answer.append(base64.b64encode(ctypes.string_at(address, size)).decode())
            libc.free(address)
        answers.append(answer)
    json.dump(answers, sys.stdout)


def allocate(data: bytes) -> int:
    address = libc.malloc(len(data))
    ctypes.memmove(address, data, len(data))
    return address


main()
