"""vLLM's private names and habits, in one room; tests/serving/test_vllm_compat.py says what each must be."""
