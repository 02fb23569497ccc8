"""The starter model's card and figure, from the stored results: no number is typed by hand. Run by benchmarks/starter49.py."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from neuroseg3d.networks.checkpoint import STARTER
from neuroseg3d.core import REGIONS
from neuroseg3d.studies.split import load_split

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / 'nbs' / 'images' / 'starter_volumes.png'


def results() -> dict:
    "What was measured out of fold."
    return json.loads((HERE / 'results' / 'starter49.json').read_text(encoding='utf-8'))


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    "A Markdown table."
    line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
    return '\n'.join([line(head), '|---' * len(head) + '|', *map(line, rows)])


def with_interval(found: dict) -> str:
    "A mean, its interval, and of how many."
    return f'{found["dice"]:.3f} ({found["ci95"][0]:.3f}–{found["ci95"][1]:.3f}), n={found["n"]}' if found else '–'


def scores_table(found: dict) -> str:
    "Mean Dice now and before."
    series = {'plain thresholds': found['plain']['all'], 'with rules': found['with_rules']['all'],
              'before, plain': found['before']['plain'], 'before, its rules': found['before']['with_rules']}
    return table(['mean Dice (95 %)', *REGIONS], [[name, *(with_interval(m[r]) for r in REGIONS)] for name, m in series.items()])


def lesions_table(found: dict) -> str:
    "Distances, false and missed lesions."
    series = {'plain thresholds': found['plain']['all'], 'with rules': found['with_rules']['all'],
              'before, plain': found['before']['plain'], 'before, its rules': found['before']['with_rules']}
    rows = [[name, r, f'{m[r]["hd95_median_mm"]:.1f}', f'{m[r]["lesion_dice"]:.3f}', f'{m[r]["false_lesions_a_case"]:.2f}',
             f'{m[r]["missed_lesions"]} of {m[r]["lesions"]}'] for name, m in series.items() for r in REGIONS]
    return table(['', 'region', 'median HD95, mm', 'lesion-wise Dice', 'false lesions a case', 'lesions missed'], rows)


def strata_table(found: dict) -> str:
    "Mean Dice by kind of patient."
    return table(['', *REGIONS], [[name, *(with_interval(m.get(r)) for r in REGIONS)] for name, m in found['plain']['strata'].items()])


def missing_table(found: dict) -> str:
    "Mean Dice with each sequence missing."
    series = {'nothing': found['plain']['all'], **found['missing']}
    return table(['missing', *REGIONS], [[name, *(f'{m[r]["dice"]:.3f}' for r in REGIONS)] for name, m in series.items()])


def empty_table(found: dict) -> str:
    "What is found where no tumour is."
    rows = []
    for name, tag in (('shipped', 'shipped'), ('before', 'before')):
        one = found['without_tumour'][tag]
        rows += [[name, patient, *(f'{v["rules"][r]:.1f}' for r in REGIONS)] for patient, v in sorted(one['patients'].items())]
        fresh = one['phantoms']['rules']
        rows.append([name, 'phantoms, median (largest)', *(f'{fresh[r]["median_ml"]:.1f} ({fresh[r]["largest_ml"]:.1f})' for r in REGIONS)])
    return table(['', '', *REGIONS], rows)


def cases_table(found: dict) -> str:
    "Dice and volumes of each exam, plain thresholds."
    rows = [[row['case'], *('–' if row['ml'][r] <= (0.5 if r == 'ET' else 0) else f'{row["plain"][r]["dice"]:.2f}' for r in REGIONS),
             *(f'{row["plain"][r]["found_ml"]:.1f} / {row["ml"][r]:.1f}' for r in REGIONS)] for row in sorted(found['cases'], key=lambda r: r['case'])]
    return table(['exam', *(f'{r} Dice' for r in REGIONS), *(f'{r} mL, found / reference' for r in REGIONS)], rows)


def gain_text(found: dict) -> str:
    "What was gained over the starter of before."
    return '; '.join(f'{r} {g["gain"]:+.3f} ({g["ci95"][0]:+.3f} to {g["ci95"][1]:+.3f}), better in {g["better"]} of {g["n"]}'
                     for r, g in found['gain']['plain'].items())


def rules_text(found: dict) -> str:
    "Rules, temperatures and intervals in sentences."
    rule, fit, held = found['rules']['chosen_on_all'], found['calibration'], found['intervals']
    slashed = lambda values, digits: ' / '.join(f'{v:.{digits}f}' for v in values)
    return '\n\n'.join([
        f'Thresholds {", ".join(f"{r} {t:g}" for r, t in zip(REGIONS, rule["thresholds"]))}; connected parts smaller than '
        f'{", ".join(f"{ml:g} mL ({r})" for r, ml in zip(REGIONS, rule["min_ml"]))} are dropped. Chosen on all {fit["n_cases"]} out-of-fold predictions: '
        'thresholds by Dice, then the size that leaves fewest false parts at next to no cost in Dice. The numbers above are with the rules that '
        'the other folds chose.',
        f'Temperatures {slashed(fit["temperature"], 2)} (WT / TC / ET), fitted on the same predictions: calibration error near the tumour '
        f'{slashed(fit["ece_before"], 3)} before, {slashed(fit["ece_after"], 3)} after.',
        f'{1 - held["alpha"]:.0%} intervals of volumes, each calibrated on the other folds: '
        + '; '.join(f'{r} held in {held[r]["covered"]} of {held[r]["n"]}, median width {held[r]["median_width_ml"]:.0f} mL where the median volume is '
                    f'{held[r]["median_volume_ml"]:.0f} mL' for r in REGIONS)
        + '. Rank correlation of the Dice that the model expects with the Dice that it gets: '
        + ', '.join(f'{r} {held[r]["expected_dice_rank_correlation"]:.2f}' for r in REGIONS)
        + '. Rules, temperatures and intervals were found on the five networks, not on the mean of their weights, which is shipped.'])


def failures_text(found: dict) -> str:
    "The worst of what was measured, in sentences."
    rows = found['cases']
    ml = lambda row, r: f'{row["plain"][r]["found_ml"]:.1f} mL for {row["ml"][r]:.1f} ({row["case"]})'
    dice = lambda row: f'{row["plain"]["WT"]["dice"]:.2f} ({row["case"]})'
    over = sorted((r for r in rows if r['ml']['TC'] < 20), key=lambda r: -r['plain']['TC']['found_ml'] / max(r['ml']['TC'], 0.1))
    under = sorted((r for r in rows if r['ml']['ET'] > 5), key=lambda r: r['plain']['ET']['found_ml'] / r['ml']['ET'])
    none = [r for r in rows if r['ml']['ET'] <= 0.5]
    small = sorted((r for r in rows if r['ml']['WT'] < 50), key=lambda r: -r['plain']['WT']['found_ml'] / r['ml']['WT'])
    lost = [r for r in rows if r['plain']['WT']['found_ml'] < 0.5 * r['ml']['WT']]
    worst = sorted(rows, key=lambda r: r['plain']['WT']['dice'])
    return '\n'.join([
        f'- **Small cores are over-called**: {len(over)} references have a core below 20 mL; the largest factors: {", ".join(ml(r, "TC") for r in over[:4])}.',
        f'- **Large enhancement is under-called**: {", ".join(ml(r, "ET") for r in under[:4])}.',
        f'- **Enhancement where there is next to none**: {", ".join(ml(r, "ET") for r in none)}.',
        f'- **Small tumours**: those below 50 mL come out as {", ".join(ml(r, "WT") for r in small[:4])}.',
        f'- **Tumours nearly lost**, since brains without one are part of the training: found at less than half of their size: {", ".join(ml(r, "WT") for r in lost)}.',
        f'- **Lowest Dice of the whole tumour**: {", ".join(map(dice, worst[:3]))}.'])


def card(settings: dict) -> str:
    "The card's text."
    found = results()
    stream, run = settings['stream'], settings['run']
    everyone = found['plain']['all']['WT']
    mean = found['mean']
    times, trained = len(settings['networks']), list(load_split(STARTER.with_name('starter_split.json')).cases)
    remaining = '' if times == 5 else (f'The network without the fifth fold is still to be trained: the {len(trained) - len(settings["seven"]) - everyone["n"]} '
                                       'exams of that fold are trained on and not scored.\n')
    ssa = sum('SSA' in name for name in trained)
    slashed = lambda which: ' / '.join(f'{mean[r][which]:.3f}' for r in REGIONS)
    from outoffold import patient  # these scripts import this one
    from starter49 import ATTRIBUTION, LICENCE
    values = {'n_train': len(trained), 'p_train': len({patient({'case': name}) for name in trained}), 'n_ssa': ssa, 'n_other': len(trained) - ssa - 1,
              'times': ('four', 'five')[times - 4], 'remaining': remaining, 'steps': run['trainer']['max_steps'],
              'first': round(100 * (1 - settings['patches']['last_share'])), 'first_size': '×'.join(map(str, settings['patches']['first'])),
              'healthy': round(100 * stream['healthy_phantoms']), 'mirrored': round(100 * stream['mirrored']), 'phantoms': round(100 * stream['phantoms']),
              'n': everyone['n'], 'p': everyone['patients'], 'scores': scores_table(found), 'gain': gain_text(found),
              'lesions': lesions_table(found), 'strata': strata_table(found), 'missing': missing_table(found), 'empty': empty_table(found),
              'fresh': found['without_tumour']['shipped']['phantoms']['plain']['WT']['n'], 'n_mean': mean['WT']['n'], 'mean_mean': slashed('mean'),
              'mean_single': slashed('network'), 'cases': cases_table(found), 'rules': rules_text(found), 'failures': failures_text(found),
              'licence': LICENCE, 'attribution': '\n'.join(f'- {a}' for a in ATTRIBUTION)}
    text = (HERE / 'starter_card.md').read_text(encoding='utf-8')
    for key, value in values.items():
        text = text.replace('{' + key + '}', str(value))
    return text


def figure() -> Path:
    "Found against true volumes, and Dice of the core by its share of the tumour."
    rows, colours = results()['cases'], {True: '#d95f02', False: '#1b6ca8'}
    drawing, axes = plt.subplots(1, 4, figsize=(13, 3.4), facecolor='white')
    for axis, region in zip(axes, REGIONS):
        for african in (False, True):
            own = [r for r in rows if ('SSA' in r['case']) == african]
            axis.loglog([max(r['ml'][region], 0.1) for r in own], [max(r['plain'][region]['found_ml'], 0.1) for r in own], 'o', markersize=4,
                        alpha=0.75, color=colours[african], label='BraTS-Africa' if african else 'BraTS 2018–2021')
        axis.plot([0.1, 400], [0.1, 400], color='#8b929c', linewidth=1)
        axis.set(title=f'{region}, mL (0.1: none)', xlabel='reference', ylabel='found')
    for african in (False, True):
        own = [r for r in rows if ('SSA' in r['case']) == african]
        axes[3].plot([r['ml']['TC'] / r['ml']['WT'] for r in own], [r['plain']['TC']['dice'] for r in own], 'o', markersize=4, alpha=0.75,
                     color=colours[african])
    axes[3].set(title='Dice of the core', xlabel='share of the core in the whole tumour', ylim=(0, 1))
    axes[0].legend(fontsize=7, frameon=False)
    drawing.tight_layout()
    drawing.savefig(FIGURE, dpi=70)
    plt.close(drawing)
    return FIGURE


def write_card(settings: dict) -> Path:
    "The card beside the weights, and the figure that it shows."
    figure()
    path = STARTER.with_suffix('.md')
    path.write_text(card(settings), encoding='utf-8')
    return path
