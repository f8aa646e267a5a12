# write: LENGTH TOKEN STAMP NOTE SAID, with LENGTH bytes on stdin
# Replaces the file in one step where its owner, mode and hard links would survive that, and in place where not. With a
# STAMP, only if the file is still the one that was read. Where there is a NOTE, it was done before and is not done
# again; where not, one that holds SAID is made right before the file changes. Answers: ok.
resolve "$@"
shift "$taken"
length=$1 token=$2 expected=$3 note=$4 said=$5
done_before() { [ -n "$note" ] && [ -e "$note" ]; }
if done_before; then say ok; exit 0; fi
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
# Of two who do it at once, only one makes the note. It may be that none can: the agent may have removed the directory.
if [ -n "$note" ] && ! (set -C; printf '%s' "$said" >"$note") 2>/dev/null && done_before; then say ok; exit 0; fi
# A file that is a mount point cannot be renamed over.
if [ -z "$whole" ] || ! mv -f "$part" "$target" 2>/dev/null; then
  cat "$part" >"$target" || { [ -z "$note" ] || rm -f "$note"; exit 1; }
fi
say ok
