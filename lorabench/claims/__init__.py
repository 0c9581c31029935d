"""The paper's claims, each with a criterion and a function that judges it from the tidy tables.

Each module declares the claims of one subject, each directly below the function that judges it; a new claim is such a
pair, and its name in the module's `CLAIMS`. `judge` lists the claims of all modules and judges them on tables.

The first letter of an id is the claim's family: A learning curves and capacity, N stored bits, B learning rate, C early
curves and parametrization, D batch size, E placement, M mixtures of experts, F reinforcement learning, G compute.
Statements and numbers are the paper's; where the paper leaves open what would confirm a statement, its criterion here
decides.
"""
