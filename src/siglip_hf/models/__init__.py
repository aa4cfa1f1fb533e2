"""Configurations, towers, the joint model and the classifier of both families, and how published weights become theirs."""
