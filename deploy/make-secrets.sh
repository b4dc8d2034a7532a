#!/bin/sh
# Makes the secrets that compose.yaml, the Kubernetes manifests and the systemd unit refer to, each once:
# what is there already is kept. Usage: make-secrets.sh [FOLDER], by default deploy/secrets, which git ignores.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
folder=${1:-$here/secrets}
umask 077
mkdir -p "$folder"
cd "$folder"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
write() { [ -s "$1" ] || { cat >"$1.new" && mv "$1.new" "$1"; }; }

printf 'default:%s\nmonitoring:%s\n' "$(random)" "$(random)" | write tokens
random | write redis_password
random | write keda_password
random | write queue_key
sed -n 's/^monitoring://p' tokens | head -n 1 | tr -d '\n' >scrape_token

# Redis needs only digests of the passwords, so its file is made anew each time, from the template and the passwords.
digest() { sha256sum <"$1" | cut -d ' ' -f 1; }
sed -e "s/@LOCKGATE@/#$(digest redis_password)/" -e "s/@KEDA@/#$(digest keda_password)/" \
    "$here/redis/users.acl.template" >users.acl

# Containers read these files as the users of their images. Without root, whoever runs this has to see to it.
if [ "$(id -u)" = 0 ]; then
    chown 10001:10001 tokens redis_password queue_key
    chown 999:1000 users.acl
fi
echo "$folder: tokens redis_password keda_password queue_key users.acl scrape_token"
