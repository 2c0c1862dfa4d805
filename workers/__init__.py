"""The worker side: carries calls from claim to settlement and decides nothing.

It is the top layer. It uses the orchestrator and the providers; nobody imports it, tasks are published by name.
"""
