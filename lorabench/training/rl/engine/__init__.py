"""The engine vLLM as the sampler of RL, in a process of its own, to which the trainer hands over its policies."""
