"""The command line with ai-toolkit's plugin in it, whether or not it is installed as an entry point."""

import sys

import loraport_ai_toolkit.plugin as plugin
from loraport.cli.main import main
from loraport.plugins import plugins

if plugin.AiToolkit.name not in plugins().backends():
    plugins().manager.register(plugin, "ai_toolkit")
sys.exit(main())
