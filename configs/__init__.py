"""Training configs: `get_config(arg)` gives a locked ConfigDict with every key written out; `get_sweep()` the named sweeps."""
