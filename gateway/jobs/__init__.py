"""Durable async inference: a request is kept in Redis as a job, run by whichever gateway comes to it, and its result kept.

A job's record in Redis is the only truth; every process may die. Each change of state happens in one transaction that
holds only if nobody changed the record since it was read, so a job ends exactly once even if it ran twice. A gateway
runs a job under a lease; one that dies loses it, and another gateway runs the job again.
"""
