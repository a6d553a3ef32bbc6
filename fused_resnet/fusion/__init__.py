"""Chains in graphs that torch.dynamo captured: what they are (``matcher``), and how they run (``lowering``)."""
