#!/bin/sh
# fetch_ort_headers.sh FOLDER PACKAGE: unpack ONNX Runtime's C++ headers from a Debian package into FOLDER/onnxruntime.
#
# apt gets a list of sources of its own (the machine's mirror, release "trixie") and its own state below FOLDER:
# nothing is installed, and the machine's apt is not touched.
set -eu
folder=$1 package=$2
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
missing() {
    echo "ONNX Runtime's C++ headers are missing ($1): set ORT_INCLUDE=FOLDER of onnxruntime_cxx_api.h" >&2
    exit 1
}
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || missing "this is no Debian to get $package with"
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null | grep -m1 '/debian/\?$') ||
    missing "apt knows no Debian mirror; run apt-get update"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$state/lists/partial" "$state/archives/partial" "$folder"
echo "deb [signed-by=$keyring] $mirror trixie main" >"$state/sources.list"
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$state/lists" -o Dir::Cache="$state" -o APT::Sandbox::User= "$@"
}
apt update >"$state/log" 2>&1 || missing "apt-get update failed: $(tail -n1 "$state/log")"
(cd "$state" && apt download "$package" >log 2>&1) || missing "$package: $(tail -n1 "$state/log")"
dpkg-deb -x "$state"/*.deb "$state/root"
rm -rf "$folder/onnxruntime"
mv "$state/root/usr/include/onnxruntime" "$folder/onnxruntime"
