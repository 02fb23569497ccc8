"""What explaining one region of a 240x240x155 case costs on a CPU: seconds and peak memory, method by method.

    python benchmarks/explanations.py             # all methods, some minutes
    python benchmarks/explanations.py occlusion   # one; the others' numbers stay

A network of the 'tiny' preset with random weights (cost does not depend on them), windows of 96 voxels with an overlap of a quarter,
the enhancing tumour of an in-silico patient at 1 mm. Each method runs in a process of its own, without its sanity check, which
costs the same again. Writes benchmarks/results/explanations.json.
"""
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

RESULT = Path(__file__).resolve().parent / 'results' / 'explanations.json'


def measure(method: str, queue) -> None:
    "Seconds and peak memory of one method, in a fresh process."
    import torch
    from neuroseg3d.networks.checkpoint import Model
    from neuroseg3d.phantom import make_phantom
    from neuroseg3d.studies.preprocess import Space, to_model_space
    from neuroseg3d.networks.unet import UNet, UNetConfig
    from neuroseg3d.networks.windows import Windows
    from neuroseg3d.evaluation.attribution import ask, explain_case
    torch.manual_seed(0)
    network = UNet(UNetConfig(preset='tiny')).eval().requires_grad_(False).to(memory_format=torch.channels_last_3d)
    model = Model([network], Space(), Windows(overlap=0.25), 'regions', [{}], [])
    seen = to_model_space(make_phantom(3, 1.0), model.space)
    question = ask(model, seen, 'ET', seen.label[0] == 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    explain_case(question, method, check=False)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    queue.put({'seconds': round(seconds, 1), 'peak_mb': round(peak), 'peak_mb_after_prediction': round(before),
               'windows_with_the_region': len(question.parts), 'box': list(seen.image.shape[1:]), 'voxels_of_et': int(question.mask.sum())})


def main(methods: list[str]) -> None:
    context = multiprocessing.get_context('spawn')
    out = json.loads(RESULT.read_text(encoding='utf-8')) if RESULT.is_file() else {}
    out |= {'grid': [240, 240, 155], 'cores': os.cpu_count()}
    for method in methods or ('grad_cam', 'integrated_gradients', 'shapley', 'occlusion'):
        queue = context.Queue()
        process = context.Process(target=measure, args=(method, queue))
        process.start()
        out[method] = queue.get()
        process.join()
        print(method, out[method], flush=True)
        RESULT.write_text(json.dumps(out, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1:])
