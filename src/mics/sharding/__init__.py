"""fully_shard, shard and micro_steps, and what they are made of."""
