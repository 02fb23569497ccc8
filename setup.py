"Everything is in settings.ini; this hands it to setuptools."
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(ROOT / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
licences = {'apache2': 'Apache-2.0'}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature']


def readme() -> str:
    "README.md with its relative links made absolute, as a package index needs them."
    path = ROOT / 'README.md'
    text = path.read_text(encoding='utf-8') if path.exists() else cfg['description']
    raw = f'{cfg["git_url"].replace("github.com", "raw.githubusercontent.com")}/{cfg["branch"]}/'
    text = re.sub(r'(!\[[^\]]*\]\()(?!https?:|#)', rf'\g<1>{raw}', text)
    return re.sub(r'(\]\()(?!https?:|#|mailto:)', rf'\g<1>{cfg["git_url"]}/blob/{cfg["branch"]}/', text)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme(),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url']},
    keywords=cfg['keywords'].split(),
    license=licences[cfg['license']],
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        'Programming Language :: Python :: 3',
    ],
    packages=find_packages(include=[cfg['lib_path'], f'{cfg["lib_path"]}.*']),
    include_package_data=True,
    python_requires=f'>={cfg["min_python"]}',
    install_requires=shlex.split(cfg['requirements']),
    extras_require={'dev': shlex.split(cfg['dev_requirements'])},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d']},
    zip_safe=False,
)
