"""Checkpoints on disk: the torch_dist directory, its manifest and metadata, sharded saving and loading.

The modules that read and describe files import no megatron: conversion builds on them.
"""
