"""posttrain: Chinese-first LLM post-training as a pipeline of standalone scripts driven by YAML."""
