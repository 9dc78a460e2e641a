-- Stands before claim, apply, poll and delete. Their first keys are always those of the partition.
local SEQ, INDEX, DEL = KEYS[1], KEYS[2], KEYS[3]
local call = redis.call
local DELETES_KEPT_MS = 24 * 3600 * 1000

-- Lua's own way to print a number stops at 14 digits.
local function whole(number)
  return string.format('%.0f', number)
end

-- The server's clock, the only one that all agents share, in milliseconds.
local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Drops what is past its time; a series' hash expires by itself. Answers how many series that were. An index that
-- somebody spoilt must hold up no batch.
local function trim(now, expire_ms)
  redis.pcall('ZREMRANGEBYSCORE', DEL, '-inf', whole(now - DELETES_KEPT_MS))
  local expired = redis.pcall('ZREMRANGEBYSCORE', INDEX, '-inf', whole(now - expire_ms))
  return type(expired) == 'number' and expired or 0
end

-- The deletes behind number `seen`, oldest first: series, number, series, number ...
local function deletes(seen)
  local answer = redis.pcall('ZRANGEBYSCORE', DEL, '(' .. seen, '+inf', 'WITHSCORES', 'LIMIT', 0, 500)
  return answer.err and {} or answer
end

-- Notes how far an agent knows the deletes.
local function note_seen(agent, before, seen)
  if before ~= seen then
    call('HSET', SEQ, agent .. ':seen', seen)
  end
end
