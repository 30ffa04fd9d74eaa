"""The first package that DiffSynth's training imports. Stands for whatever goes wrong there; STAND_IN says what."""

import os
import time

with open("pid", "w") as file:
    file.write(str(os.getpid()))
if os.environ["STAND_IN"] == "hang":
    time.sleep(120)
raise SystemError("the card is on fire")
