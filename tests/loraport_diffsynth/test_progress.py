"""What a failure's log lines are made into."""

from __future__ import annotations

import pytest

from loraport.errors import BackendError, DataError, OutOfMemoryError, RunFolderError, SpecError
from loraport.run.errors_line import encode_error
from loraport.run.events import Step
from loraport_diffsynth.progress import explain_failure, read_line

BAR = " 12%|█▎        | 1/8 [00:00<00:01,  6.88it/s]"


def test_events_are_read_and_a_bar_is_ordinary_text() -> None:
    events = read_line('@loraport {"type":"step","time":1,"step":1,"total":4,"loss":0.5}')
    assert isinstance(next(iter(events or ())), Step)
    assert read_line(BAR) is None


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", OutOfMemoryError),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", OutOfMemoryError),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error.", DataError),
        ("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.", DataError),
        ("OSError: [Errno 28] No space left on device", RunFolderError),
        ("ModuleNotFoundError: No module named 'bitsandbytes'", BackendError),
        ("ImportError: torchao is required for torchao quantization methods.", BackendError),
        ("diffsynth: error: unrecognized arguments: --lora_alpha 8", SpecError),
        ("diffsynth: error: argument --lora_rank: invalid int value: 'x'", SpecError),
        ("ValueError: Target modules layers\\.9 not found in the base model.", SpecError),
        ("ValueError: Cannot detect the model type. File: x.safetensors. Model hash: 1", DataError),
    ],
)
def test_a_known_failure_is_one_error_with_its_line(line: str, kind: type[Exception]) -> None:
    error = explain_failure(1, f"Loading\n{BAR}\rTraceback (most recent call last):\n  File x\n{line}\n")
    assert type(error) is kind
    assert line in str(error)
    assert error.hint


def test_an_error_that_the_process_told_counts_before_all_others() -> None:
    told = DataError("A caption is too long.", hint="Shorten it.")
    assert str(explain_failure(4, f"CUDA out of memory\n{encode_error(told)}\n")) == str(told)


def test_an_unknown_failure_shows_the_last_lines_without_bars() -> None:
    error = explain_failure(1, f"one\n{BAR}\r{BAR}\r\n@loraport x\nKeyError: 'dit'\n")
    assert "KeyError: 'dit'" in str(error)
    assert "it/s" not in str(error)
    assert "@loraport" not in str(error)


def test_a_kill_by_the_system_is_told_as_memory() -> None:
    assert isinstance(explain_failure(137, "Loading\n"), OutOfMemoryError)
