"""The paper's claims, each with a criterion and a function that judges it from the tidy tables.

A claim is a decorator, with what it is judged on, above the function that judges one part of that, in a module that
`judge` imports, or of a study. Its statement, its criterion and more stand in the YAML file beside it (see `texts`).

The first letter of an id is the claim's family: A learning curves and capacity, N stored bits, B learning rate, C early
curves and parametrization, D batch size, E placement, M mixtures of experts, F reinforcement learning, G compute.
Statements and numbers are the paper's; where it leaves open what would confirm a statement, its criterion here decides.
"""
