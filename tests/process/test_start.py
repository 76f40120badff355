"""Laws of what is made ready when torch is imported, and of memory that ends at any moment."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Sequence

import pytest

from qlora_kit.commands.failure import reports_errors
from qlora_kit.errors import DataError, ModelError, UnsafeInputError
from qlora_kit.process.out_of_memory import is_out_of_memory, missing_bytes
from qlora_kit.process.start import ALLOCATOR, NEEDED_BYTES, allocator_settings

IMPORTS = (
    "import os, sys\n"
    "from qlora_kit.commands.failure import reports_errors\n"
    "def main(argv):\n"
    "    assert 'torch' not in sys.modules\n"
    "    import torch\n"
    "    print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('PYTORCH_ALLOC_CONF'))\n"
    "    return 0\n"
    "sys.exit(reports_errors(main)([]))\n"
)


def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    ours = ("OMP_", *ALLOCATOR)
    kept = {n: v for n, v in os.environ.items() if not any(one in n for one in ours)}
    return subprocess.run(
        [sys.executable, "-c", IMPORTS],
        capture_output=True,
        text=True,
        env={**kept, "OMP_DISPLAY_ENV": "TRUE", "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


SEGMENTS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("environment", "policy", "allocator"),
    [
        ({}, "PASSIVE", SEGMENTS),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", SEGMENTS),
        ({"GOMP_SPINCOUNT": "5", ALLOCATOR[1]: "x:1"}, "None", None),
    ],
)
def test_threads_sleep_and_cuda_has_expandable_segments_unless_the_user_said_how(
    environment: dict[str, str], policy: str, allocator: str | None
) -> None:
    done = run(environment)
    assert (done.returncode, done.stdout) == (0, f"{policy} {allocator}\n")
    # OpenMP itself has heard of it: torch was not there before.
    assert f"OMP_WAIT_POLICY = '{policy if policy != 'None' else 'PASSIVE'}'" in done.stderr


def test_so_do_those_of_a_program_that_uses_the_package() -> None:
    code = "import os; from qlora_kit import load_base; print(os.environ.get('OMP_WAIT_POLICY'))"
    kept = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=False
    )
    assert (done.returncode, done.stdout) == (0, "PASSIVE\n")


@pytest.mark.parametrize(
    ("version", "kernel", "expected"),
    [
        ("2.13.0+cu130", "6.1.0-18-amd64", "PYTORCH_ALLOC_CONF"),
        ("2.9.0", "6.1.0-18-amd64", "PYTORCH_ALLOC_CONF"),
        ("2.8.0+cu128", "6.1.0-18-amd64", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.13.0+cu130", "5.15.167.4-microsoft-standard-WSL2", None),
        ("2.13.0+rocm7.0", "6.1.0-18-amd64", None),
    ],
)
def test_the_allocator_is_set_by_the_name_that_its_torch_knows(
    version: str, kernel: str, expected: str | None
) -> None:
    assert list(allocator_settings(version, kernel)) == ([expected] if expected else [])


CUDA_LINE = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.60 GiB of "
    "which 5.00 MiB is free. Of the allocated memory 10.90 GiB is allocated by PyTorch, and 90.00 "
    "MiB is reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        (CUDA_LINE, 15 * 2**20),
        (CUDA_LINE.replace("5.00 MiB is free", "1.50 GiB is free"), 20 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", None),
        ("CUDA error: out of memory", None),
    ],
)
def test_what_the_libraries_of_a_card_say_when_it_is_full(said: str, missing: int | None) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert missing_bytes(said) == missing


@pytest.mark.parametrize("name", ["NOT_SUPPORTED", "EXECUTION_FAILED", "INVALID_VALUE"])
def test_other_errors_of_theirs_are_not_taken_for_that(name: str) -> None:
    assert not is_out_of_memory(RuntimeError(f"CUDA error: CUBLAS_STATUS_{name} when calling"))


def test_libraries_that_a_limit_does_not_hold_are_not_imported() -> None:
    """They would abort the process in the middle."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (NEEDED_BYTES - 1, before[1]))
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (done.returncode, done.stdout) == (4, "")
    said = f"error: the limit on memory (ulimit -v) is {NEEDED_BYTES - 1} bytes, and a command "
    assert done.stderr.startswith(said)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("libgomp.so.1: failed to map segment from shared object"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        caused(RuntimeError("Failed to import transformers.models"), MemoryError()),
        caused(ModelError("config.json: describes no model", "correct it"), MemoryError()),
        caused(KeyError("x"), caused(ValueError("y"), RuntimeError("bad_alloc"))),
    ],
    ids=repr,
)
def test_memory_that_ends_is_exit_code_4(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    assert main([]) == 4
    assert "out of memory" in (line := capsys.readouterr().err)
    assert "or raise the limit on memory (ulimit -v)" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (caused(UnsafeInputError("the template was stopped", "use another"), MemoryError()), 3),
        (caused(DataError("rows.jsonl:1: bad", "correct it"), ValueError("x")), 3),
        (RuntimeError("shapes do not fit"), 1),
    ],
)
def test_what_is_not_memory_keeps_its_code(error: Exception, code: int) -> None:
    @reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    assert main([]) == code
