-- Reads the hashes from KEYS[2] on and, at the same moment, the sequence of an agent.
-- ARGV: agent. Answer: sequence, then for each hash its fields and values, or the text of the error.
local answer = {redis.call('HGET', KEYS[1], ARGV[1]) or '0'}
for i = 2, #KEYS do
  local fields = redis.pcall('HGETALL', KEYS[i])
  answer[i] = fields.err or fields
end
return answer
