"""The items of ``tools/gpu_check.sh``: what only a GPU can show, each runnable small on a CPU.

No item needs pytest. Each is a function of a :class:`tests.gpu_check.check.Check` in ``parity``,
``blocks``, ``training``, ``speed`` or ``deployed``; ``items`` lists them with their budgets.
"""
