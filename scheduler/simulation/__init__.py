"""The scheduler on a virtual clock: traces, workloads, cost models, experiments. Nothing that serves imports this."""
