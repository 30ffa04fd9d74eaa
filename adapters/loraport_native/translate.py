"""Spec → plan for the native trainer, which reads the resolved spec itself, so there is nothing to generate."""

from __future__ import annotations

from loraport.planning import Context, Translation
from loraport.spec.models import TrainSpec
from loraport_native.capabilities import verdicts
from loraport_native.launch import command


def translate(spec: TrainSpec, context: Context) -> Translation:
    """A pure function; see `loraport.backend.Backend.translate`."""
    return Translation(
        verdicts=verdicts(spec),
        files={},
        command=command(spec, context.run_dir),
        env={
            "PYTHONUNBUFFERED": "1",
            # One allocator setting that costs nothing and keeps fragmentation from ending long runs.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            # What backend.options.deterministic needs of cuBLAS; it costs nothing otherwise.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        },
    )
