"""Train a sparse model in a loop of your own: no Trainer, no run folder, one optimizer.

Three things make it a Mixture-of-Experts loop: balance losses are in ``output.loss`` already, each
controller is stepped once per optimizer step on what its layers did in it, and the load is worth printing.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moesaic as mz
from moesaic.telemetry import RoutingSummary

torch.manual_seed(0)
text = b"the quick brown fox jumps over the lazy dog. two plus two makes four. " * 60
tokens = torch.tensor(list(text))

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = mz.sparsify(LlamaForCausalLM(config), "deepseek-v3", hidden=64, num_experts=8, top_k=2, init_std=0.1)
controllers = mz.hf.controllers(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

summaries: dict[str, RoutingSummary] = {}


def look(seen):
    """Add up what each layer did since the last optimizer step."""
    summary = RoutingSummary.of(seen.routing)
    summaries[seen.layer] = summaries[seen.layer] + summary if seen.layer in summaries else summary


for step in range(30):
    start = torch.randint(len(tokens) - 64, (8,)).tolist()
    input_ids = torch.stack([tokens[s : s + 64] for s in start])
    with mz.hf.observe(model, look):
        loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for steered in controllers:
        steered.step(summaries)
    if step % 10 == 9:
        imbalance = " ".join(f"{summary.load_max_over_mean:.2f}" for summary in summaries.values())
        print(f"step {step + 1:3}  loss {loss.item():.3f}  busiest expert over mean, by layer: {imbalance}")
    summaries.clear()
