"""`loraport dataset ...`"""

from __future__ import annotations

import typer

from loraport_dataset import check_command, stats_command, wrap_command
from loraport_dataset.captioning import command as caption_command
from loraport_dataset.fixing import command as fix_command

app = typer.Typer(help="Look after a dataset.", no_args_is_help=True)


@app.callback()
def _dataset() -> None:
    """Look after a dataset."""


# In the order of use, which is that of --help.
check_command.add_commands(app)
fix_command.add_commands(app)
wrap_command.add_commands(app)
caption_command.add_commands(app)
stats_command.add_commands(app)
check_command.add_rules_command(app)
