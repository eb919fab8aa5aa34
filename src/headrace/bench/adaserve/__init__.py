"""``headrace bench adaserve``: latency targets of every request's own, under load, simulated and real.

:mod:`~headrace.bench.adaserve.simulated` replays AdaServe's evaluation (EuroSys 2026, section 6) on simulated GPUs,
:mod:`~headrace.bench.adaserve.real` serves its prompts on this machine, :mod:`~headrace.bench.adaserve.identity` compares answers,
:mod:`~headrace.bench.adaserve.assisted` asks the peer; :mod:`~headrace.bench.adaserve.run` does all of them.
"""
