"""`RedisQueue`: gateways and workers in many processes, on many hosts, meet in Redis streams."""
