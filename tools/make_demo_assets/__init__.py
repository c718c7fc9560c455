"""How the tiny backbone and language model of the demo were trained: `make assets`."""
