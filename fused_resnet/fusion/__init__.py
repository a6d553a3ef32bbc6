"""Chains in graphs that torch.dynamo captured: ``matcher`` finds them, ``lowering`` puts operators in their place."""
