"""Measuring a model: IFEval, MT-Bench, lm-eval tasks, perplexity and divergence."""
