-- Applies a batch, once. The sequence is written first and in the same script, so a batch that is sent twice, late or
-- after a failover counts once. An operation that fails (a key of another type, a field that is no number) fails alone.
-- KEYS from the fourth on: the hash of each operation.
-- ARGV: agent, owner, sequence, sequence before it, deletes seen, expiry in ms, samples; then for each operation the
-- number of its arguments, its start and update in ms, and verbs with their arguments.
-- Answer: 'owner'; or 'applied', 'already' or 'gap', stored sequence, samples up to it, time, series expired, deletes, and the failed
-- operations: index from 0, error, index, error ...
local agent, owner, sequence, before, seen = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local expire_ms, samples = ARGV[6], ARGV[7]

local function number(text)
  return tonumber(text) or error({err = 'ERR hash value is not a float'})
end

-- HMGET and HSET of any number of fields: Lua hands at most some thousand arguments to a call.
local CHUNK = 500

local function get_all(key, fields)
  local values = {}
  for from = 1, #fields, CHUNK do
    local part = call('HMGET', key, unpack(fields, from, math.min(from + CHUNK - 1, #fields)))
    for i = 1, #part do
      values[from + i - 1] = part[i]
    end
  end
  return values
end

local function set_all(key, pairs)
  for from = 1, #pairs, CHUNK do
    call('HSET', key, unpack(pairs, from, math.min(from + CHUNK - 1, #pairs)))
  end
end

-- Registers rise: `fields` and `ranks` side by side. Several members may share a register, so the ranks set here count
-- as well as those that were there.
local function raise(key, fields, ranks)
  local old = get_all(key, fields)
  local highest, new = {}, {}
  for i = 1, #fields do
    local before = highest[fields[i]] or number(old[i] or '0')
    highest[fields[i]] = math.max(before, number(ranks[i]))
    if number(ranks[i]) > before then
      new[#new + 1] = fields[i]
      new[#new + 1] = ranks[i]
    end
  end
  set_all(key, new)
end

-- Each verb takes the key and the position of its first argument, and answers the position behind its last.
local verb = {}

-- i field number: adds a whole number; what 64 bits can't hold goes on in the fraction, as a float.
verb['i'] = function(key, at)
  local reply = redis.pcall('HINCRBY', key, ARGV[at], ARGV[at + 1])
  if type(reply) == 'table' and reply.err then
    if not string.find(reply.err, 'overflow', 1, true) then
      error(reply)
    end
    call('HINCRBYFLOAT', key, ARGV[at] .. 'frac', ARGV[at + 1])
  end
  return at + 2
end

-- f field number: adds a float.
verb['f'] = function(key, at)
  call('HINCRBYFLOAT', key, ARGV[at], ARGV[at + 1])
  return at + 2
end

-- < field number: the least stays. The text is stored as it came, so no digit is lost.
verb['<'] = function(key, at)
  local old = call('HGET', key, ARGV[at])
  if not old or number(ARGV[at + 1]) < number(old) then
    call('HSET', key, ARGV[at], ARGV[at + 1])
  end
  return at + 2
end

-- > field number: the greatest stays.
verb['>'] = function(key, at)
  local old = call('HGET', key, ARGV[at])
  if not old or number(ARGV[at + 1]) > number(old) then
    call('HSET', key, ARGV[at], ARGV[at + 1])
  end
  return at + 2
end

-- = field value: replaces it. For what this agent alone writes.
verb['='] = function(key, at)
  call('HSET', key, ARGV[at], ARGV[at + 1])
  return at + 2
end

-- l value time: the latest value stays.
verb['l'] = function(key, at)
  local time = call('HGET', key, 'valueTime')
  if not time or number(ARGV[at + 1]) >= number(time) then
    call('HSET', key, 'value', ARGV[at], 'valueTime', ARGV[at + 1])
  end
  return at + 2
end

-- g value time changed 'change' whole 'changefrac' fraction: a gauge that was set at `time` ('' for never) and since
-- then changed by whole + fraction, last at `changed` (0 for never). The newest set wins, changes after it count. Of one
-- agent the later set is the newer one, whatever its clock said: it may have been wrong.
verb['g'] = function(key, at)
  local time, changed = ARGV[at + 1], number(ARGV[at + 2])
  local old = call('HMGET', key, 'valueTime', 'valueAgent', 'changeTime')
  local old_time, old_changed = old[1] and number(old[1]), number(old[3] or '0')
  local counts = changed > 0
  if time ~= '' and (not old_time or agent == old[2] or number(time) > old_time
      or number(time) == old_time and agent >= (old[2] or '')) then
    call('HSET', key, 'value', ARGV[at], 'valueTime', time, 'valueAgent', agent)
    if old_changed <= number(time) or old_time and number(time) < old_time then
      call('HDEL', key, 'change', 'changefrac', 'changeTime')
      old_changed = 0
    end
  elseif old_time then
    counts = counts and (changed > old_time or agent == old[2] or time == '' and changed == old_time)
  end
  if counts then
    verb['i'](key, at + 3)
    verb['f'](key, at + 5)
    if changed > old_changed then
      call('HSET', key, 'changeTime', ARGV[at + 2])
    end
  end
  return at + 7
end

-- h most count (hash register rank) ...: members, of which at most `most` are kept one by one.
verb['h'] = function(key, at)
  local most, last = number(ARGV[at]), at + 1 + 3 * number(ARGV[at + 1])
  local fields = {}
  for i = at + 2, last, 3 do
    fields[#fields + 1] = 'm:' .. ARGV[i]
  end
  local there = get_all(key, fields)
  local members = number(call('HGET', key, 'members') or '0')
  local new, registers, ranks = {}, {}, {}
  for i = 1, #fields do
    if not there[i] and members < most then
      members = members + 1
      new[#new + 1] = fields[i]
      new[#new + 1] = ''
    elseif not there[i] then
      registers[#registers + 1] = 'r:' .. ARGV[at + 3 * i]
      ranks[#ranks + 1] = ARGV[at + 3 * i + 1]
    end
  end
  if #new > 0 then
    set_all(key, new)
    call('HSET', key, 'members', members)
  end
  raise(key, registers, ranks)
  return last + 1
end

-- r count (register rank) ...: HyperLogLog registers.
verb['r'] = function(key, at)
  local last = at + 2 * number(ARGV[at])
  local fields, ranks = {}, {}
  for i = at + 1, last, 2 do
    fields[#fields + 1] = 'r:' .. ARGV[i]
    ranks[#ranks + 1] = ARGV[i + 1]
  end
  raise(key, fields, ranks)
  return last + 1
end

local function operate(key, at, last)
  local start, update = ARGV[at], ARGV[at + 1]
  local old = call('HMGET', key, 'startTime', 'updateTime')
  local first = not old[1] or number(start) < number(old[1])
  local latest = not old[2] or number(update) > number(old[2])
  if first then
    call('HSET', key, 'startTime', start, 'updateTime', latest and update or old[2])
  elseif latest then
    call('HSET', key, 'updateTime', update)
  end
  call('PEXPIRE', key, expire_ms)
  at = at + 2
  while at <= last do
    at = verb[ARGV[at]](key, at + 1)
  end
end

local stored = call('HMGET', SEQ, agent, agent .. ':owner', agent .. ':seen', agent .. ':samples')
if stored[2] ~= owner then
  return {'owner'}
end
local at_sequence = stored[1] or '0'
local now = now_ms()
local answer = 'applied'
if tonumber(at_sequence) >= tonumber(sequence) then
  answer = 'already'
elseif at_sequence ~= before then
  answer = 'gap'
end
local failed = {}
if answer == 'applied' then
  at_sequence = sequence
  call('HSET', SEQ, agent, sequence)
  redis.pcall('HINCRBY', SEQ, agent .. ':samples', samples)
  local scores = {}
  local at = 8
  for i = 4, #KEYS do
    local last = at + tonumber(ARGV[at])
    local done, problem = pcall(operate, KEYS[i], at + 1, last)
    if done then
      -- See delete.lua for the cut.
      scores[#scores + 1] = whole(now)
      scores[#scores + 1] = string.sub(KEYS[i], #SEQ)
    else
      failed[#failed + 1] = i - 4
      failed[#failed + 1] = type(problem) == 'table' and problem.err or tostring(problem)
    end
    at = last + 1
  end
  for from = 1, #scores, CHUNK do
    redis.pcall('ZADD', INDEX, unpack(scores, from, math.min(from + CHUNK - 1, #scores)))
  end
end
note_seen(agent, stored[3], seen)
return {answer, at_sequence, stored[4] or '0', now, trim(now, tonumber(expire_ms)), deletes(seen), failed}
