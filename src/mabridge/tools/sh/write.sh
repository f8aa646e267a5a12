# write: LENGTH TOKEN STAMP, with LENGTH bytes on stdin
# Replaces the file in one step where its owner, mode and hard links would survive that, and in place where not. With a
# STAMP, only if the file is still the one that was read. Answers: ok.
resolve "$@"
shift "$taken"
length=$1 token=$2 expected=$3
[ -z "$readonly" ] || fail readonly "$readonly"
dir=${target%/*}
whole=''
if [ -e "$target" ]; then
  [ ! -d "$target" ] || fail error 'is a directory'
  [ -f "$target" ] || fail irregular
  measure "$target"
  [ -z "$expected" ] || [ "$expected" = "$stamp" ] || fail changed
  if [ -O "$target" ] && [ "$links" -eq 1 ] && [ "$size" -le 16777216 ]; then whole=1; fi
else
  [ -z "$expected" ] || fail changed
  [ "$beyond" -ne 1 ] || fail error 'file already exists'
  [ "$beyond" -eq 0 ] || fail error 'not a directory'
  mkdir -p "$dir/" || exit 1
  whole=1
fi
stage=$dir
[ -w "$dir/" ] || stage=${TMPDIR:-/tmp} whole=''
part=$stage/.mab-$token
trap 'rm -f "$part"' EXIT
if [ -n "$whole" ] && [ -e "$target" ]; then cp -p "$target" "$part" || exit 1; fi
cat >"$part" || exit 1
[ "$(($(wc -c <"$part")))" -eq "$length" ] || fail short
# A file that is a mount point cannot be renamed over.
if [ -z "$whole" ] || ! mv -f "$part" "$target" 2>/dev/null; then cat "$part" >"$target" || exit 1; fi
say ok
