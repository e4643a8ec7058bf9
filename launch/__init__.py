"""Launching: from one config file to many runs, here or on a cluster. Words are XManager's.

An *experiment* is a config file and a sweep; each point of the sweep is a *work unit* with its own work directory; a
work unit runs one *job* (the trainer's command, in one or more processes); an *executor* renders the job for a machine
and submits it.
Nothing here imports jax or the package: a laptop without an accelerator can launch on a pod.
"""
