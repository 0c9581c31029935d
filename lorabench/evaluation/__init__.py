"""The evaluation of models with lm-evaluation-harness (lm-eval): its catalogue of tasks, and the job."""
