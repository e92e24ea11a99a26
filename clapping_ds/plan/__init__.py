"""What a training would take over slow links, before it runs: step time and memory of a pipeline with and
without compression, beside data parallelism, ZeRO and one GPU; which to use, and the block for it.

    python -m clapping_ds.plan --model config.json --gpu "RTX 4090" --nodes 2 --mbit 1000 --ms 1

Nothing is measured. Compute is counted in FLOPs at a share of the GPU's published rate, links are as told,
and a pipeline's step is the model of `clapping_ds.plan.timeline`, which gives the step times that this
project measured, of two stages on CPU ranks, to 10 %. Codecs were never timed on a GPU: what they take is
what memory needs for it. What a codec does to the loss was measured on SmolLM2-135M, with nothing trained,
and is told beside the times.
"""
