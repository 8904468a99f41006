#!/bin/sh
# Downloads the C API headers of ONNX Runtime into a folder, without touching the system:
#
#     fetch_onnxruntime_headers.sh OUT
#
# No ONNX Runtime wheel ships them, but Debian packages them (libonnxruntime-dev, Debian 13 and later). apt is run with
# private state, cache and sources, so that a release that lacks the package (or a user who is not root) can get it
# from the mirror that the system already uses. Prints the include folder; fails with a sentence on stderr.
set -eu

out=$1
suite=trixie
package=libonnxruntime-dev

fail() { echo "ONNX Runtime headers not downloaded: $1" >&2; exit 1; }

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null 2>&1 || fail "no $tool here"
done
mirror=$(apt-get indextargets --no-release-info --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -E '/debian/?$' | head -n 1)
[ -n "$mirror" ] || fail "apt has no Debian mirror among its sources"

mkdir -p "$out"
out=$(cd "$out" && pwd)
mkdir -p "$out/apt/lists/partial" "$out/apt/cache/archives/partial"
: >"$out/apt/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$out/apt/sources.list"

private_apt() {
    apt-get -qq -o Dir::State="$out/apt" -o Dir::State::status="$out/apt/status" -o Dir::Cache="$out/apt/cache" \
        -o Dir::Etc::sourcelist="$out/apt/sources.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User="" \
        -o Acquire::Languages=none -o Acquire::Retries=2 -o Acquire::http::Timeout=30 "$@" >&2
}

private_apt update || fail "apt could not read $suite"
(cd "$out" && private_apt download "$package") || fail "apt could not download $package"
dpkg-deb -x "$out"/"$package"_*.deb "$out/root"
rm -rf "$out/apt" "$out"/*.deb
header=$(find "$out/root" -name onnxruntime_cxx_api.h | head -n 1)
[ -n "$header" ] || fail "$package has no onnxruntime_cxx_api.h"
dirname "$header"
