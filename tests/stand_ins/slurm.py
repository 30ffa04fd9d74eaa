"""Stands for sbatch, srun and sacct, by the name that it is called under: jobs run at once, on this machine.

Their numbers and states are files in the folder that holds it.
"""

import os
import subprocess
import sys
from pathlib import Path

place = Path(sys.argv[0]).parent
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
if name == "sbatch":
    number = str(len(list(place.glob("*.state"))) + 100)
    (place / f"{number}.sbatch").write_text(Path(arguments[-1]).read_text())
    (place / f"{number}.state").write_text("RUNNING")
    told = {"JOB_ID": number, "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NTASKS": "1", "NNODES": "1"}
    told |= {"JOB_NUM_NODES": "1", "JOB_NODELIST": "here", "NODELIST": "here"}
    draft = f"{place}/{number}.draft"
    script = f"bash {place}/{number}.sbatch && echo COMPLETED > {draft} || echo FAILED > {draft}; "
    subprocess.Popen(
        ["bash", "-c", f"{script} mv {draft} {place}/{number}.state"],
        env={**os.environ, **{f"SLURM_{key}": value for key, value in told.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    print(f"Submitted batch job {number}")
elif name == "srun":
    first = next(number for number, word in enumerate(arguments) if word.endswith(("python", "python3")))
    job = os.environ["SLURM_JOB_ID"]
    paths = [arguments[arguments.index(option) + 1].replace("%j", job) for option in ("--output", "--error")]
    with open(paths[0].replace("%t", "0"), "wb") as out, open(paths[1].replace("%t", "0"), "wb") as error:
        sys.exit(subprocess.run(arguments[first:], stdout=out, stderr=error).returncode)
elif name == "sacct":
    print("JobID|State|NodeList")
    for state in place.glob("*.state"):
        print(f"{state.stem}|{state.read_text().strip()}|here")
