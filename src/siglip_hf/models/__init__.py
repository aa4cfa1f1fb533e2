"""Configurations, towers, the joint model and the classifier of both families, and the conversion of weights."""
