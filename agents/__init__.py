"""Learners that search an environment for the best plan, behind one protocol and one registry."""
