"""The LLM backends, the agent and the scorers."""
