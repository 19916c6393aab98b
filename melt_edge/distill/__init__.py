"""Training: a LoopLM becomes a MELT model in two phases, and the objective its teacher was trained with."""
