-- What an agent without batches asks for: the deletes since the last it knows.
-- ARGV: agent, deletes seen, expiry in ms. Answer: time, series expired, deletes.
local agent, seen, expire_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

note_seen(agent, call('HGET', SEQ, agent .. ':seen'), seen)
local now = now_ms()
return {now, trim(now, expire_ms), deletes(seen)}
