"""The agent's loop (model, tools, model, …), the tools it runs, and the calls found in a model's text."""
