"""`python -m loraport_native.evaluate JOB`: the held-out loss of LoRAs on one model; see `loraport.scoring`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import LoraPortError
from loraport.run.errors_line import encode_error
from loraport.scoring import Score, read_job
from loraport.spec.models import TrainSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraport_native.data import TrainingSet
    from loraport_native.models.ideogram4 import Ideogram4


def main() -> int:
    try:
        spec, loras = read_job(Path(sys.argv[1]))
        evaluate(spec, loras)
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code
    return 0


def evaluate(spec: TrainSpec, loras: list[Path]) -> None:
    """Print the score of the model alone, and of each LoRA. A file that cannot be scored is told with its problem."""
    import torch

    from loraport.lora.dialect import detect_dialect
    from loraport.plugins import plugins
    from loraport_native.applied import applied
    from loraport_native.data import prepare
    from loraport_native.device import DTYPES, check_device, choose_device
    from loraport_native.models.checkpoint import find_checkpoint
    from loraport_native.placement import load_placed, set_passes

    device, dtype = choose_device(spec), DTYPES[spec.model.dtype]
    check_device(spec, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = find_checkpoint(spec.model.checkpoint, spec.model.revision, unconditional=False)
    data = prepare(spec, checkpoint, device, dtype, lambda event: None)
    model, stream = load_placed(checkpoint, spec.memory, dtype, device, trains=False)
    model.drop_text_projection()
    model.requires_grad_(False)
    model.eval()
    set_passes(model, spec.memory, stream)
    dialects = plugins().dialects()
    with torch.no_grad():
        print(Score(None, losses(model, data, spec, device)).encode(), flush=True)
        for path in loras:
            try:
                lora = detect_dialect(path, dialects).read(path)
                with applied(model, lora):
                    score = Score(str(path), losses(model, data, spec, device))
            except LoraPortError as error:
                score = Score(str(path), [], str(error))
            print(score.encode(), flush=True)


def losses(model: Ideogram4, data: TrainingSet, spec: TrainSpec, device: torch.device) -> list[float]:
    """The loss of each case of `loraport_native.held_out`."""
    import torch

    from loraport_native import flow
    from loraport_native.held_out import case, case_count

    def one(number: int) -> Tensor:
        latents, noise, sigma, keys, grid = case(data, spec.train, number)
        sigma = sigma.to(device)
        inputs, target = flow.noisy(torch.stack(latents).to(device), noise.to(device), sigma)
        text = data.text(keys[0])[None].to(device)
        return flow.losses(model.velocity(inputs, text, None, 1 - sigma, grid), target)[0]

    return [one(number).double().item() for number in range(case_count(data))]


if __name__ == "__main__":
    sys.exit(main())
